#include "io/checkpoint.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cstdlib>
#include <string>
#include <utility>
#include <vector>

#include "io/temporary_folder.h"

namespace prismaquant {
namespace {

namespace stdfs = std::filesystem;
using ::testing::HasSubstr;
using ::testing::Not;

// A safetensors file of one-dimensional U8 tensors: name -> contents.
std::string File(const std::vector<std::pair<std::string, std::string>>& tensors) {
  std::vector<TensorSpec> specs;
  std::string data;
  for (const auto& [name, contents] : tensors) {
    specs.push_back({name, DType::kU8, {static_cast<int64_t>(contents.size())}});
    data += contents;
  }
  return SafetensorsHeader(specs, {}) + data;
}

std::string Index(const std::vector<std::pair<std::string, std::string>>& files) {
  Json map = Json::object();
  for (const auto& [tensor, file] : files) map[tensor] = file;
  return Json{{"weight_map", map}}.dump();
}

constexpr char kIndex[] = "model.safetensors.index.json";

class CheckpointTest : public ::testing::Test {
 protected:
  CheckpointTest() { folder_.Put("config.json", R"({"model_type":"tiny"})"); }
  // Two shards: x in one, y and z in the other.
  void PutShards() {
    folder_.Put("one.safetensors", File({{"x", "xx"}}));
    folder_.Put("two.safetensors", File({{"z", "zzz"}, {"y", "y"}}));
    folder_.Put(
        kIndex,
        Index({{"x", "one.safetensors"}, {"y", "two.safetensors"}, {"z", "two.safetensors"}}));
  }
  Checkpoint MustOpen() {
    auto checkpoint = Checkpoint::Open(folder_.path());
    EXPECT_TRUE(checkpoint.ok()) << checkpoint.status().message();
    return std::move(checkpoint).value();
  }
  void ExpectRefused(const std::vector<std::string>& parts) {
    const auto checkpoint = Checkpoint::Open(folder_.path());
    ASSERT_FALSE(checkpoint.ok());
    EXPECT_EQ(checkpoint.status().code(), StatusCode::kInvalidInput);
    EXPECT_THAT(checkpoint.status().message(), Not(HasSubstr("\n")));
    for (const std::string& part : parts) {
      EXPECT_THAT(checkpoint.status().message(), HasSubstr(part));
    }
  }
  std::string Fingerprint() {
    const auto fingerprint = MustOpen().Fingerprint();
    EXPECT_TRUE(fingerprint.ok());
    return *fingerprint;
  }

  TemporaryFolder folder_;
};

TEST_F(CheckpointTest, OpensASingleFile) {
  folder_.Put("model.safetensors", File({{"b", "1234"}, {"a", "56"}}));
  const Checkpoint checkpoint = MustOpen();
  EXPECT_EQ(checkpoint.names(), (std::vector<std::string>{"b", "a"}));
  EXPECT_EQ(checkpoint.parameters(), 6);
  EXPECT_EQ(checkpoint.file_bytes(),
            static_cast<int64_t>(stdfs::file_size(folder_ / "model.safetensors")));
  EXPECT_EQ(checkpoint.config()["model_type"], "tiny");
  EXPECT_EQ(checkpoint.Get("a")->bytes.size(), 2u);
  EXPECT_EQ(checkpoint.Find("c"), nullptr);
  const Status missing = checkpoint.Get("c").status();
  EXPECT_THAT(missing.message(), HasSubstr("tensor c"));
  EXPECT_THAT(missing.message(), HasSubstr(folder_.path().string()));
  checkpoint.WillNeed({"a", "c"});
  checkpoint.DontNeed({"a", "b", "c"});
  EXPECT_EQ(static_cast<char>(checkpoint.Get("a")->bytes[1]), '6');
}

TEST_F(CheckpointTest, OpensShardsOfAnyName) {
  PutShards();
  const Checkpoint checkpoint = MustOpen();
  EXPECT_EQ(checkpoint.names(), (std::vector<std::string>{"x", "z", "y"}));
  EXPECT_EQ(checkpoint.parameters(), 6);
}

TEST_F(CheckpointTest, ShardMayBeASymlinkLeadingOutside) {
  TemporaryFolder blobs;
  folder_.Put(kIndex, Index({{"x", "one.safetensors"}}));
  stdfs::create_symlink(blobs.Put("0a1b", File({{"x", "xx"}})), folder_ / "one.safetensors");
  EXPECT_EQ(MustOpen().parameters(), 2);
}

TEST_F(CheckpointTest, StaysValidWhenMoved) {
  PutShards();
  Checkpoint first = MustOpen();
  const Checkpoint second = std::move(first);
  EXPECT_EQ(static_cast<char>(second.Get("z")->bytes[0]), 'z');
}

TEST_F(CheckpointTest, RefusesAFolderThatIsNoCheckpoint) {
  ExpectRefused({"model.safetensors", kIndex});
  folder_.Put("model.safetensors", File({{"a", "1"}}));
  folder_.Put("config.json", "{");
  ExpectRefused({"config.json", "not valid JSON"});
  folder_.Put("config.json", "[]");
  ExpectRefused({"config.json", "is array", "object"});
  stdfs::remove(folder_ / "config.json");
  ExpectRefused({"config.json", "no such file"});
  const auto missing = Checkpoint::Open(folder_ / "none");
  EXPECT_EQ(missing.status().code(), StatusCode::kInvalidInput);
  EXPECT_THAT(missing.status().message(), HasSubstr("none: no such folder"));
}

TEST_F(CheckpointTest, RefusesAMalformedIndex) {
  for (const char* text : {"[]", "{}", R"({"weight_map":[]})", R"({"weight_map":{}})"}) {
    folder_.Put(kIndex, text);
    ExpectRefused({kIndex, "weight_map"});
  }
  folder_.Put(kIndex, R"({"weight_map":{"x":3}})");
  ExpectRefused({kIndex, "tensor x"});
  folder_.Put(kIndex, R"({"weight_map":{"x":"a.safetensors","x":"b.safetensors"}})");
  ExpectRefused({kIndex, "\"x\"", "twice"});
}

TEST_F(CheckpointTest, RefusesShardPathsThatLeaveTheFolder) {
  TemporaryFolder outside;
  outside.Put("w.safetensors", File({{"x", "xx"}}));
  folder_.Put("sub/w.safetensors", File({{"x", "xx"}}));
  const std::string name = outside.path().filename().string();
  for (const std::string& path :
       {(outside / "w.safetensors").string(), "../" + name + "/w.safetensors",
        std::string("sub/w.safetensors"), std::string("./w.safetensors"), std::string(".."),
        std::string("."), std::string(""), std::string("sub/"),
        std::string("w.safetensors\0x", 15)}) {
    folder_.Put(kIndex, Index({{"x", path}}));
    ExpectRefused({kIndex, "tensor x", "expected a file of this folder"});
  }
}

TEST_F(CheckpointTest, RefusesAListedFileThatIsMissing) {
  PutShards();
  stdfs::remove(folder_ / "two.safetensors");
  ExpectRefused({kIndex, "two.safetensors", "does not exist"});
}

TEST_F(CheckpointTest, RefusesAListedTensorThatIsNotInItsFile) {
  PutShards();
  folder_.Put("two.safetensors", File({{"z", "zzz"}}));
  ExpectRefused({"two.safetensors", "tensor y", "missing"});
}

TEST_F(CheckpointTest, RefusesATensorInTwoShards) {
  PutShards();
  folder_.Put("two.safetensors", File({{"z", "zzz"}, {"y", "y"}, {"x", "xx"}}));
  ExpectRefused({"two.safetensors", "tensor x", "one.safetensors"});
}

TEST_F(CheckpointTest, RefusesATensorThatTheIndexDoesNotList) {
  PutShards();
  folder_.Put("one.safetensors", File({{"x", "xx"}, {"extra", "e"}}));
  ExpectRefused({"one.safetensors", "tensor extra", "nowhere"});
}

TEST_F(CheckpointTest, RefusesASingleFileBesideAnIndexWithoutIt) {
  PutShards();
  folder_.Put("model.safetensors", File({{"x", "xx"}}));
  ExpectRefused({"model.safetensors", kIndex, "remove one"});
  stdfs::remove(folder_ / "one.safetensors");
  stdfs::remove(folder_ / "two.safetensors");
  folder_.Put(kIndex, Index({{"x", "model.safetensors"}}));
  EXPECT_EQ(MustOpen().parameters(), 2);
}

TEST_F(CheckpointTest, RefusesABrokenShard) {
  PutShards();
  folder_.Put("two.safetensors", "short");
  ExpectRefused({"two.safetensors", "too short"});
}

TEST_F(CheckpointTest, FingerprintTellsCheckpointsApart) {
  std::string weights(300'000, 'w');
  folder_.Put("model.safetensors", File({{"a", weights}}));
  const std::string first = Fingerprint();
  EXPECT_EQ(first.size(), 64u);
  EXPECT_EQ(Fingerprint(), first);
  std::set<std::string> seen = {first};
  for (const size_t at : {size_t{0}, weights.size() / 2, weights.size() - 1}) {
    std::string changed = weights;
    changed[at] = 'x';
    folder_.Put("model.safetensors", File({{"a", changed}}));
    EXPECT_TRUE(seen.insert(Fingerprint()).second) << at;
  }
  folder_.Put("model.safetensors", File({{"b", weights}}));
  EXPECT_TRUE(seen.insert(Fingerprint()).second) << "name";
  folder_.Put("model.safetensors", File({{"a", weights + "w"}}));
  EXPECT_TRUE(seen.insert(Fingerprint()).second) << "size";
  folder_.Put("model.safetensors", File({{"a", weights}}));
  folder_.Put("tokenizer.json", "{}");
  EXPECT_TRUE(seen.insert(Fingerprint()).second) << "tokenizer";
  folder_.Put("config.json", R"({"model_type":"other"})");
  EXPECT_TRUE(seen.insert(Fingerprint()).second) << "config";
}

TEST_F(CheckpointTest, FingerprintIgnoresTheLayoutOfConfig) {
  folder_.Put("model.safetensors", File({{"a", "1"}}));
  const std::string first = Fingerprint();
  folder_.Put("config.json", "{\n  \"model_type\" : \"tiny\"\n}\n");
  EXPECT_EQ(Fingerprint(), first);
}

TEST_F(CheckpointTest, RequireUnquantizedNamesTheScheme) {
  folder_.Put("model.safetensors", File({{"a", "1"}}));
  const std::string scheme = R"({"quant_method":"awq","format":"pack"})";
  for (const std::string& config :
       {R"({"quantization_config":)" + scheme + "}", R"({"compression_config":)" + scheme + "}",
        R"({"text_config":{"quantization_config":)" + scheme + "}}",
        R"({"text_config":{"quantization_config":null},"quantization_config":)" + scheme + "}",
        R"({"quantization_config":null,"compression_config":)" + scheme + "}"}) {
    folder_.Put("config.json", config);
    const Status status = RequireUnquantized(MustOpen());
    EXPECT_EQ(status.code(), StatusCode::kInvalidInput) << config;
    for (const char* part : {"config.json", "awq", "pack"}) {
      EXPECT_THAT(status.message(), HasSubstr(part)) << config;
    }
  }
  for (const char* config : {"{}", R"({"text_config":{"x":1}})", R"({"text_config":null})",
                             R"({"quantization_config":null})"}) {
    folder_.Put("config.json", config);
    EXPECT_TRUE(RequireUnquantized(MustOpen()).ok()) << config;
  }
}

TEST_F(CheckpointTest, PassthroughTakesTheListedNamesOnly) {
  const std::set<std::string> taken = {"tokenizer.json",
                                       "tokenizer_config.json",
                                       "vocab.json",
                                       "merges.txt",
                                       "special_tokens_map.json",
                                       "added_tokens.json",
                                       "LICENSE",
                                       "LICENSE.md",
                                       "generation_config.json",
                                       "modeling_x.py",
                                       "preprocessor_config.json",
                                       "video_preprocessor_config.json",
                                       "chat_template.json",
                                       "processor_config.json",
                                       "chat_template.jinja"};
  for (const std::string& name : taken) folder_.Put(name, "contents of " + name);
  for (const char* name : {"README.md", "model.safetensors", kIndex, "pytorch_model.bin", "a.pt",
                           "a.gguf", "a.onnx", ".hidden.py", ".git/LICENSE", "sub/x.py", "notes"}) {
    folder_.Put(name, "no");
  }
  stdfs::create_directory(folder_ / "LICENSES");
  stdfs::create_symlink("nowhere", folder_ / "dangling.py");
  stdfs::resize_file(folder_.Put("vocab.py", ""), 64 * 1024 * 1024 + 1);
  const auto files = PassthroughFiles(folder_.path());
  ASSERT_TRUE(files.ok()) << files.status().message();
  std::set<std::string> names;
  for (const auto& [name, contents] : *files) {
    names.insert(name);
    EXPECT_EQ(contents, "contents of " + name);
  }
  EXPECT_EQ(names, taken);
}

TEST_F(CheckpointTest, PassthroughFollowsSymlinksOfACache) {
  TemporaryFolder blobs;
  stdfs::create_symlink(blobs.Put("0a1b", "{}"), folder_ / "tokenizer.json");
  const auto files = PassthroughFiles(folder_.path());
  ASSERT_TRUE(files.ok());
  EXPECT_EQ(files->count("tokenizer.json"), 1u);
  EXPECT_FALSE(PassthroughFiles(folder_ / "none").ok());
}

TEST(BundledModel, Opens) {
  const char* root = std::getenv("PRISMAQUANT_SOURCE_DIR");
  const stdfs::path folder = stdfs::path(root == nullptr ? "" : root) / "examples/tiny-qwen3_5";
  std::error_code error;
  if (!stdfs::exists(folder / "config.json", error)) GTEST_SKIP() << "no " << folder;
  const auto checkpoint = Checkpoint::Open(folder);
  ASSERT_TRUE(checkpoint.ok()) << checkpoint.status().message();
  EXPECT_GT(checkpoint->parameters(), 0);
  EXPECT_TRUE(RequireUnquantized(*checkpoint).ok());
}

}  // namespace
}  // namespace prismaquant
