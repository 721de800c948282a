#ifndef PRISMAQUANT_TOKENIZER_BPE_H_
#define PRISMAQUANT_TOKENIZER_BPE_H_

// Bpe: byte-level byte-pair encoding of one pre-token: bytes become the 256 letters of the byte
// alphabet, and adjacent symbols are merged by rank, the leftmost of equals first, in O(n log n).
// Immutable after Parse and thread-safe.

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
  // `model`: the "model" object of a tokenizer.json.
  static Result<Bpe> Parse(const Json& model, const std::string& origin);

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
  void MergeSymbols(std::vector<int32_t>& symbols) const;

  std::unordered_map<std::string, int32_t> vocabulary_;
  std::unordered_map<uint64_t, Merge> merges_;
  std::vector<int32_t> byte_ids_;  // per byte, -1 if the vocabulary lacks its letter
  bool ignore_merges_ = false;
  int32_t size_ = 0;
};

// The UTF-8 spelling of each byte in the byte alphabet of GPT-2.
const std::vector<std::string>& ByteAlphabet();

}  // namespace prismaquant

#endif  // PRISMAQUANT_TOKENIZER_BPE_H_
