#ifndef PRISMAQUANT_TOKENIZER_BPE_H_
#define PRISMAQUANT_TOKENIZER_BPE_H_

// Bpe: byte-pair encoding of one piece of text: adjacent symbols are merged by rank, the leftmost
// of equals first, in O(n log n). The first symbols are bytes, spelled in the 256 letters of the
// byte alphabet, or characters, of which those that the vocabulary lacks fall back to tokens of
// their bytes or to the unknown token. Immutable after Parse and thread-safe.

#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <unordered_map>
#include <vector>

#include "base/json.h"
#include "base/status.h"

namespace prismaquant {

class Bpe {
 public:
  enum class Symbols { kBytes, kCharacters };
  // `model`: the "model" object of a tokenizer.json.
  static Result<Bpe> Parse(const Json& model, Symbols symbols, const std::string& origin);

  void Encode(std::string_view piece, std::vector<int32_t>& ids) const;
  // Id of a token as the vocabulary spells it (byte alphabet).
  std::optional<int32_t> Id(const std::string& token) const;
  int32_t size() const { return size_; }

 private:
  struct Merge {
    int32_t rank = 0, result = 0;
  };
  static uint64_t Pair(int32_t left, int32_t right) {
    return static_cast<uint64_t>(static_cast<uint32_t>(left)) << 32 | static_cast<uint32_t>(right);
  }
  Status ParseVocabulary(const Json& model, const std::string& origin);
  Status ParseMerges(const Json& model, const std::string& origin);
  Status ParseFallbacks(const Json& model, const std::string& origin);
  // What ignore_merges looks up: the piece as the vocabulary spells it.
  std::string Spelling(std::string_view piece) const;
  std::vector<int32_t> FirstSymbols(std::string_view piece) const;
  void MergeSymbols(std::vector<int32_t>& symbols) const;

  std::unordered_map<std::string, int32_t> vocabulary_;
  std::unordered_map<uint64_t, Merge> merges_;
  Symbols symbols_ = Symbols::kBytes;
  // Per byte its letter's id, or that of its fallback token; -1 if the vocabulary has none.
  std::vector<int32_t> byte_ids_;
  int32_t unknown_ = -1;  // id, -1: characters that have no token are dropped
  bool byte_fallback_ = false, fuse_unknown_ = false;
  bool ignore_merges_ = false;
  int32_t size_ = 0;
};

// The UTF-8 spelling of each byte in the byte alphabet of GPT-2.
const std::vector<std::string>& ByteAlphabet();

}  // namespace prismaquant

#endif  // PRISMAQUANT_TOKENIZER_BPE_H_
