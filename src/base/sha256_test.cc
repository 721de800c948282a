#include "base/sha256.h"

#include <gtest/gtest.h>

#include <string>
#include <utility>

namespace prismaquant {
namespace {

// FIPS 180-4 examples.
constexpr char kEmpty[] = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855";
constexpr char kAbc[] = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad";
constexpr char kMillion[] = "cdc76e5c9914fb9281a1c7e284d73e67f1809a48a497200e046d39ccc7112cd0";

TEST(Sha256, MatchesPublishedVectors) {
  EXPECT_EQ(Sha256Hex(""), kEmpty);
  EXPECT_EQ(Sha256Hex("abc"), kAbc);
  EXPECT_EQ(Sha256Hex(std::string(1'000'000, 'a')), kMillion);
}

TEST(Sha256, DoesNotDependOnThePieces) {
  Sha256 hash;
  const std::string text(1'000'000, 'a');
  for (size_t at = 0, step = 1; at < text.size(); at += step, step = step * 3 + 1) {
    hash.Update(std::string_view(text).substr(at, step));
  }
  EXPECT_EQ(hash.Hex(), kMillion);
}

TEST(Sha256, TakesBytesAndMoves) {
  Sha256 first;
  first.Update(std::string_view("ab"));
  Sha256 second = std::move(first);
  const std::byte c{'c'};
  EXPECT_EQ(second.Update(std::span(&c, 1)).Hex(), kAbc);
}

}  // namespace
}  // namespace prismaquant
