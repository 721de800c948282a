#include "store/database.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <bit>
#include <limits>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "io/temporary_folder.h"

namespace prismaquant {
namespace {

using namespace std::string_literals;
using ::testing::AllOf;
using ::testing::HasSubstr;
using ::testing::Not;

class DatabaseTest : public ::testing::Test {
 protected:
  void SetUp() override { database_ = Open(); }
  Database Open() const { return Database::Open(folder_ / "d.sqlite").value(); }
  Statement Prepare(const std::string& sql) { return database_->Prepare(sql).value(); }
  void Execute(const std::string& sql) {
    const Status status = database_->Execute(sql);
    ASSERT_TRUE(status.ok()) << status.message();
  }
  int64_t Count(const std::string& table) {
    Statement count = Prepare("SELECT COUNT(*) FROM " + table);
    EXPECT_TRUE(*count.Step());
    return count.Int(0);
  }

  TemporaryFolder folder_;
  std::optional<Database> database_;
};

TEST_F(DatabaseTest, ValuesComeBackBitForBit) {
  Execute("CREATE TABLE t (i INTEGER, d REAL, s TEXT, v BLOB)");
  constexpr double kInfinity = std::numeric_limits<double>::infinity();
  const std::vector<double> numbers = {0.1, -0.0, 5e-324, 1e308, -kInfinity};
  std::vector<double> vector = numbers;
  vector.push_back(std::numeric_limits<double>::quiet_NaN());
  const std::string text = "two\nlines\0and a NUL, \xc3\xa9"s;
  for (const double number : numbers) {
    Statement insert = Prepare("INSERT INTO t VALUES (?, ?, ?, ?)");
    insert.Bind(std::numeric_limits<int64_t>::min()).Bind(number).Bind(text);
    insert.Bind(std::span<const double>(vector));
    ASSERT_FALSE(*insert.Step());
  }
  Statement read = Prepare("SELECT i, d, s, v FROM t ORDER BY rowid");
  for (const double number : numbers) {
    ASSERT_TRUE(*read.Step());
    EXPECT_EQ(read.Int(0), std::numeric_limits<int64_t>::min());
    EXPECT_EQ(read.Double(1), number);
    EXPECT_EQ(read.Text(2), text);
    const std::vector<double> found = read.Doubles(3);
    ASSERT_EQ(found.size(), vector.size());
    for (size_t i = 0; i < found.size(); ++i)
      EXPECT_EQ(std::bit_cast<uint64_t>(found[i]), std::bit_cast<uint64_t>(vector[i]));
  }
  EXPECT_FALSE(*read.Step());
}

TEST_F(DatabaseTest, NanIsRefusedAndNotStoredAsNull) {
  Execute("CREATE TABLE t (x REAL)");
  Statement insert = Prepare("INSERT INTO t VALUES (?)");
  insert.Bind(std::numeric_limits<double>::quiet_NaN());
  const Status status = insert.Step().status();
  EXPECT_EQ(status.code(), StatusCode::kSystem);
  EXPECT_THAT(status.message(), AllOf(HasSubstr("d.sqlite"), HasSubstr("value 1"), HasSubstr("NaN"),
                                      Not(HasSubstr("\n"))));
  EXPECT_EQ(Count("t"), 0);
}

TEST_F(DatabaseTest, AValueTooManyIsReportedByStep) {
  Execute("CREATE TABLE t (x)");
  Statement insert = Prepare("INSERT INTO t VALUES (?)");
  insert.Bind(int64_t{1}).Bind(int64_t{2});
  const Status status = insert.Step().status();
  EXPECT_EQ(status.code(), StatusCode::kSystem);
  EXPECT_THAT(status.message(), AllOf(HasSubstr("d.sqlite"), HasSubstr("value 2")));
  EXPECT_EQ(Count("t"), 0);
}

TEST_F(DatabaseTest, ATransactionThatFailsLeavesNothing) {
  Execute("CREATE TABLE t (x)");
  const Status status = database_->Transaction([&]() -> Status {
    PQ_RETURN_IF_ERROR(database_->Execute("INSERT INTO t VALUES (1)"));
    return Status::Unmet("stop");
  });
  EXPECT_EQ(status.message(), "stop");
  EXPECT_EQ(Count("t"), 0);
}

TEST_F(DatabaseTest, ACommitThatFailsIsRolledBack) {
  Execute("PRAGMA foreign_keys = ON");
  Execute("CREATE TABLE parent (x INTEGER PRIMARY KEY)");
  Execute("CREATE TABLE t (x REFERENCES parent DEFERRABLE INITIALLY DEFERRED)");
  const Status status =
      database_->Transaction([&] { return database_->Execute("INSERT INTO t VALUES (1)"); });
  EXPECT_EQ(status.code(), StatusCode::kSystem);
  EXPECT_THAT(status.message(), HasSubstr("FOREIGN KEY"));
  EXPECT_EQ(Count("t"), 0);
  EXPECT_TRUE(
      database_->Transaction([&] { return database_->Execute("INSERT INTO parent VALUES (1)"); })
          .ok());
}

TEST_F(DatabaseTest, ACommitIsThereAfterReopening) {
  Execute("CREATE TABLE t (x)");
  ASSERT_TRUE(
      database_->Transaction([&] { return database_->Execute("INSERT INTO t VALUES (7)"); }).ok());
  database_ = Open();
  EXPECT_EQ(Count("t"), 1);
}

TEST_F(DatabaseTest, AnotherWritersTransactionIsNotEntered) {
  Execute("CREATE TABLE t (x)");
  Database other = Open();
  bool entered = false;
  Status refused;
  const Status status = database_->Transaction([&]() -> Status {
    refused = other.Transaction([&]() -> Status {
      entered = true;
      return {};
    });
    return {};
  });
  EXPECT_TRUE(status.ok());
  EXPECT_FALSE(entered);
  EXPECT_EQ(refused.code(), StatusCode::kSystem);
  EXPECT_THAT(refused.message(), AllOf(HasSubstr("d.sqlite"), HasSubstr("locked")));
}

TEST_F(DatabaseTest, ErrorsNameTheFile) {
  EXPECT_THAT(database_->Execute("NONSENSE").message(), HasSubstr("d.sqlite"));
  EXPECT_THAT(database_->Prepare("SELECT x FROM missing").status().message(),
              AllOf(HasSubstr("d.sqlite"), HasSubstr("missing")));
  const Status status = Database::Open(folder_ / "no" / "folder.sqlite").status();
  EXPECT_EQ(status.code(), StatusCode::kSystem);
  EXPECT_THAT(status.message(), HasSubstr("folder.sqlite"));
}

TEST_F(DatabaseTest, AFileOfSomethingElseIsInvalidInput) {
  folder_.Put("x.sqlite", std::string(4096, 'x'));
  const Status status = Database::Open(folder_ / "x.sqlite").status();
  EXPECT_EQ(status.code(), StatusCode::kInvalidInput);
  EXPECT_THAT(status.message(), HasSubstr("x.sqlite"));
}

}  // namespace
}  // namespace prismaquant
