#ifndef PRISMAQUANT_IO_TEMPORARY_FOLDER_H_
#define PRISMAQUANT_IO_TEMPORARY_FOLDER_H_

// TemporaryFolder: for tests, a new empty folder that is removed with the object, and what tests do
// in it.

#include <gtest/gtest.h>
#include <unistd.h>

#include <filesystem>
#include <fstream>
#include <set>
#include <string>
#include <string_view>

namespace prismaquant {

class TemporaryFolder {
 public:
  TemporaryFolder() {
    std::string pattern = (std::filesystem::path(::testing::TempDir()) / "pq_XXXXXX").string();
    if (::mkdtemp(pattern.data()) == nullptr) ADD_FAILURE() << "mkdtemp " << pattern;
    path_ = pattern;
  }
  ~TemporaryFolder() {
    std::error_code ignored;
    std::filesystem::remove_all(path_, ignored);
  }
  TemporaryFolder(const TemporaryFolder&) = delete;
  TemporaryFolder& operator=(const TemporaryFolder&) = delete;

  const std::filesystem::path& path() const { return path_; }
  std::filesystem::path operator/(const std::string& name) const { return path_ / name; }

  // Writes a file of the folder, making the folders on its way; returns its path.
  std::filesystem::path Put(const std::string& name, std::string_view contents) const {
    const std::filesystem::path file = path_ / name;
    std::filesystem::create_directories(file.parent_path());
    std::ofstream stream(file, std::ios::binary);
    stream.write(contents.data(), static_cast<std::streamsize>(contents.size()));
    EXPECT_TRUE(stream.flush().good()) << file;
    return file;
  }

  // Names of all files and folders below, relative to the folder.
  std::set<std::string> List() const {
    std::set<std::string> names;
    for (const auto& entry : std::filesystem::recursive_directory_iterator(path_)) {
      names.insert(entry.path().lexically_relative(path_).string());
    }
    return names;
  }

 private:
  std::filesystem::path path_;
};

}  // namespace prismaquant

#endif  // PRISMAQUANT_IO_TEMPORARY_FOLDER_H_
