#include "tokenizer/bpe.h"

#include <fmt/format.h>

#include <algorithm>
#include <queue>
#include <utility>

namespace prismaquant {
namespace {

constexpr int64_t kLargestId = 1 << 28;

std::vector<std::string> MakeByteAlphabet() {
  std::vector<std::string> alphabet(256);
  int next = 256;
  for (int byte = 0; byte < 256; ++byte) {
    const bool printable =
        (byte >= 0x21 && byte <= 0x7e) || (byte >= 0xa1 && byte <= 0xac) || byte >= 0xae;
    const int code = printable ? byte : next++;
    std::string& letter = alphabet[static_cast<size_t>(byte)];
    if (code < 0x80) {
      letter = static_cast<char>(code);
    } else {
      letter = {static_cast<char>(0xc0 | code >> 6), static_cast<char>(0x80 | (code & 0x3f))};
    }
  }
  return alphabet;
}

Status RequireUnset(const Json& model, const char* key, const std::string& origin) {
  if (!model.contains(key) || model[key].is_null() || model[key] == false || model[key] == "")
    return {};
  return Status::InvalidInput(
      fmt::format("{}: model.{} = {} is not supported", origin, key, model[key].dump()));
}

}  // namespace

const std::vector<std::string>& ByteAlphabet() {
  static const std::vector<std::string> alphabet = MakeByteAlphabet();
  return alphabet;
}

Result<Bpe> Bpe::Parse(const Json& model, Symbols symbols, const std::string& origin) {
  if (!model.is_object() || model.value("type", "BPE") != "BPE") {
    return Status::InvalidInput(fmt::format("{}: model is not BPE", origin));
  }
  for (const char* key : {"dropout", "continuing_subword_prefix", "end_of_word_suffix"}) {
    PQ_RETURN_IF_ERROR(RequireUnset(model, key, origin));
  }
  Bpe bpe;
  bpe.symbols_ = symbols;
  bpe.ignore_merges_ = model.value("ignore_merges", false);
  PQ_RETURN_IF_ERROR(bpe.ParseVocabulary(model, origin));
  PQ_RETURN_IF_ERROR(bpe.ParseMerges(model, origin));
  PQ_RETURN_IF_ERROR(bpe.ParseFallbacks(model, origin));
  return bpe;
}

Status Bpe::ParseFallbacks(const Json& model, const std::string& origin) {
  if (symbols_ == Symbols::kBytes) {
    PQ_RETURN_IF_ERROR(RequireUnset(model, "byte_fallback", origin));
    for (const std::string& letter : ByteAlphabet()) byte_ids_.push_back(Id(letter).value_or(-1));
    const bool complete = std::find(byte_ids_.begin(), byte_ids_.end(), -1) == byte_ids_.end();
    return complete ? Status() : RequireUnset(model, "unk_token", origin);
  }
  byte_fallback_ = model.value("byte_fallback", false);
  fuse_unknown_ = model.value("fuse_unk", false);
  for (int byte = 0; byte < 256; ++byte) {
    byte_ids_.push_back(Id(fmt::format("<0x{:02X}>", byte)).value_or(-1));
  }
  const Json unknown = model.value("unk_token", Json());
  if (unknown.is_null()) return {};
  const auto id = unknown.is_string() ? Id(unknown.get<std::string>()) : std::nullopt;
  if (!id) {
    return Status::InvalidInput(
        fmt::format("{}: unk_token {} is no token of the vocabulary", origin, unknown.dump()));
  }
  unknown_ = *id;
  return {};
}

Status Bpe::ParseVocabulary(const Json& model, const std::string& origin) {
  if (!model.contains("vocab") || !model["vocab"].is_object()) {
    return Status::InvalidInput(fmt::format("{}: model.vocab is not an object", origin));
  }
  std::vector<char> seen;
  for (const auto& [token, id] : model["vocab"].items()) {
    if (!id.is_number_integer() || id.get<int64_t>() < 0 || id.get<int64_t>() >= kLargestId) {
      return Status::InvalidInput(
          fmt::format("{}: the id of token \"{}\" is {}", origin, token, id.dump()));
    }
    const auto value = static_cast<size_t>(id.get<int64_t>());
    if (value >= seen.size()) seen.resize(value + 1, 0);
    if (seen[value] != 0)
      return Status::InvalidInput(fmt::format("{}: id {} is given to two tokens", origin, value));
    seen[value] = 1;
    vocabulary_[token] = static_cast<int32_t>(value);
  }
  size_ = static_cast<int32_t>(seen.size());
  return {};
}

Status Bpe::ParseMerges(const Json& model, const std::string& origin) {
  if (!model.contains("merges") || !model["merges"].is_array()) {
    return Status::InvalidInput(fmt::format("{}: model.merges is not a list", origin));
  }
  int32_t rank = 0;
  for (const Json& entry : model["merges"]) {
    std::string left, right;
    if (entry.is_string()) {
      const auto text = entry.get<std::string>();
      const size_t space = text.find(' ');
      left = text.substr(0, space);
      right = space == std::string::npos ? "" : text.substr(space + 1);
    } else if (entry.is_array() && entry.size() == 2 && entry[0].is_string() &&
               entry[1].is_string()) {
      left = entry[0].get<std::string>();
      right = entry[1].get<std::string>();
    }
    const auto left_id = Id(left), right_id = Id(right), result = Id(left + right);
    if (!left_id || !right_id || !result) {
      return Status::InvalidInput(fmt::format(
          "{}: merge {} names a token that the vocabulary lacks", origin, entry.dump()));
    }
    merges_[Pair(*left_id, *right_id)] = {rank++, *result};
  }
  return {};
}

std::optional<int32_t> Bpe::Id(const std::string& token) const {
  const auto found = vocabulary_.find(token);
  return found == vocabulary_.end() ? std::nullopt : std::optional(found->second);
}

std::string Bpe::Spelling(std::string_view piece) const {
  if (symbols_ == Symbols::kCharacters) return std::string(piece);
  std::string letters;
  for (const char c : piece) letters += ByteAlphabet()[static_cast<unsigned char>(c)];
  return letters;
}

std::vector<int32_t> Bpe::FirstSymbols(std::string_view piece) const {
  std::vector<int32_t> symbols;
  const auto bytes_of = [&](std::string_view text) {
    std::vector<int32_t> ids;
    for (const char c : text) ids.push_back(byte_ids_[static_cast<unsigned char>(c)]);
    return ids;
  };
  if (symbols_ == Symbols::kBytes) {
    symbols = bytes_of(piece);
    std::erase(symbols, -1);
    return symbols;
  }
  bool after_unknown = false;
  for (size_t begin = 0, end = 0; begin < piece.size(); begin = end) {
    end = begin + 1;
    while (end < piece.size() && (static_cast<unsigned char>(piece[end]) & 0xc0) == 0x80) ++end;
    const std::string_view character = piece.substr(begin, end - begin);
    if (const auto id = Id(std::string(character))) {
      symbols.push_back(*id);
      after_unknown = false;
      continue;
    }
    const std::vector<int32_t> bytes = bytes_of(character);
    if (byte_fallback_ && std::find(bytes.begin(), bytes.end(), -1) == bytes.end()) {
      symbols.insert(symbols.end(), bytes.begin(), bytes.end());
    } else if (unknown_ >= 0 && !(after_unknown && fuse_unknown_)) {
      symbols.push_back(unknown_);
      after_unknown = true;
    }
  }
  return symbols;
}

void Bpe::Encode(std::string_view piece, std::vector<int32_t>& ids) const {
  if (ignore_merges_) {
    if (const auto id = Id(Spelling(piece))) {
      ids.push_back(*id);
      return;
    }
  }
  std::vector<int32_t> symbols = FirstSymbols(piece);
  MergeSymbols(symbols);
  ids.insert(ids.end(), symbols.begin(), symbols.end());
}

void Bpe::MergeSymbols(std::vector<int32_t>& symbols) const {
  const auto n = static_cast<int32_t>(symbols.size());
  std::vector<int32_t> previous(symbols.size()), next(symbols.size());
  struct Candidate {
    int32_t rank, position, left, right;
    bool operator>(const Candidate& other) const {
      return std::pair(rank, position) > std::pair(other.rank, other.position);
    }
  };
  std::priority_queue<Candidate, std::vector<Candidate>, std::greater<>> queue;
  const auto offer = [&](int32_t position) {
    const int32_t after = next[position];
    if (position < 0 || after >= n) return;
    const auto merge = merges_.find(Pair(symbols[position], symbols[after]));
    if (merge != merges_.end())
      queue.push({merge->second.rank, position, symbols[position], symbols[after]});
  };
  for (int32_t i = 0; i < n; ++i) {
    previous[i] = i - 1;
    next[i] = i + 1;
  }
  for (int32_t i = 0; i + 1 < n; ++i) offer(i);
  while (!queue.empty()) {
    const Candidate best = queue.top();
    queue.pop();
    const int32_t left = best.position;
    if (symbols[left] != best.left || next[left] >= n || symbols[next[left]] != best.right)
      continue;
    const int32_t right = next[left];
    symbols[left] = merges_.at(Pair(best.left, best.right)).result;
    symbols[right] = -1;
    next[left] = next[right];
    if (next[left] < n) previous[next[left]] = left;
    if (previous[left] >= 0) offer(previous[left]);
    offer(left);
  }
  symbols.erase(std::remove(symbols.begin(), symbols.end(), -1), symbols.end());
}

}  // namespace prismaquant
