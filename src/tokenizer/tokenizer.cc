#include "tokenizer/tokenizer.h"

#include <fmt/format.h>
#include <utf8proc.h>

#include <algorithm>
#include <cstdlib>
#include <unordered_map>
#include <utility>

#include "base/json.h"
#include "io/file_system.h"
#include "tokenizer/added_tokens.h"
#include "tokenizer/bpe.h"
#include "tokenizer/normalizer.h"
#include "tokenizer/pretokenizer.h"

namespace prismaquant {
namespace {

// Pieces remembered within one Encode call.
constexpr size_t kCachedPieces = 100'000;
constexpr size_t kLongestCachedPiece = 64;

Status CheckUtf8(std::string_view text) {
  size_t position = 0;
  while (position < text.size()) {
    utf8proc_int32_t code = 0;
    const auto size =
        utf8proc_iterate(reinterpret_cast<const utf8proc_uint8_t*>(text.data()) + position,
                         static_cast<utf8proc_ssize_t>(text.size() - position), &code);
    if (size <= 0)
      return Status::InvalidInput(fmt::format("the text is not UTF-8 at byte {}", position));
    position += static_cast<size_t>(size);
  }
  return {};
}

// The special token that a TemplateProcessing puts before a single text.
std::optional<std::string> TemplateStart(const Json& json) {
  if (!json.is_object()) return std::nullopt;
  const std::string type = json.value("type", "");
  if (type == "Sequence" && json.contains("processors")) {
    for (const Json& step : json["processors"]) {
      if (auto start = TemplateStart(step)) return start;
    }
  }
  if (type != "TemplateProcessing" || !json.contains("single") || json["single"].empty())
    return std::nullopt;
  const Json& first = json["single"][0];
  if (!first.contains("SpecialToken")) return std::nullopt;
  return first["SpecialToken"].value("id", "");
}

}  // namespace

struct Tokenizer::Impl {
  Impl(Normalizer normal, PreTokenizer pieces, Bpe vocabulary)
      : normalizer(std::move(normal)),
        pre_tokenizer(std::move(pieces)),
        bpe(std::move(vocabulary)),
        size(bpe.size()) {}
  static Result<std::unique_ptr<Impl>> Parse(const Json& json, const std::string& origin,
                                             const std::filesystem::path& folder);
  // The tokens that tokenizer.json lists, and those that only tokenizer_config.json does.
  Status ParseAddedTokens(const Json& json, const std::string& origin,
                          const std::filesystem::path& folder);
  std::optional<int32_t> TokenId(std::string_view token) const;

  Normalizer normalizer;
  PreTokenizer pre_tokenizer;
  Bpe bpe;
  AddedTokens raw_tokens;         // matched before normalisation
  AddedTokens normalized_tokens;  // matched after it
  std::optional<int32_t> bos;
  int32_t size = 0;

  using Cache = std::unordered_map<std::string, std::vector<int32_t>>;

  Status AddToken(const Json& json, int64_t id, const std::string& origin) {
    PQ_ASSIGN_OR_RETURN(const std::string content,
                        JsonString(json, "content", origin + ": added token"));
    if (id < 0 || id > (1 << 28))
      return Status::InvalidInput(fmt::format("{}: added token {} has id {}", origin, content, id));
    AddedToken token{.content = content,
                     .id = static_cast<int32_t>(id),
                     .single_word = json.value("single_word", false),
                     .lstrip = json.value("lstrip", false),
                     .rstrip = json.value("rstrip", false)};
    size = std::max(size, token.id + 1);
    const bool normalized = json.value("normalized", false);
    if (normalized) token.content = normalizer.Apply(content);
    (normalized ? normalized_tokens : raw_tokens).Add(std::move(token));
    return {};
  }

  void EncodePlain(std::string_view text, Cache& cache, std::vector<int32_t>& ids) const {
    for (const std::string_view piece : pre_tokenizer.Split(text)) {
      if (piece.size() > kLongestCachedPiece) {
        bpe.Encode(piece, ids);
        continue;
      }
      std::string key(piece);
      auto found = cache.find(key);
      if (found == cache.end()) {
        std::vector<int32_t> fresh;
        bpe.Encode(piece, fresh);
        if (cache.size() >= kCachedPieces) cache.clear();
        found = cache.emplace(std::move(key), std::move(fresh)).first;
      }
      ids.insert(ids.end(), found->second.begin(), found->second.end());
    }
  }
};

Tokenizer::Tokenizer(std::unique_ptr<Impl> impl) : impl_(std::move(impl)) {}
Tokenizer::Tokenizer(Tokenizer&&) noexcept = default;
Tokenizer& Tokenizer::operator=(Tokenizer&&) noexcept = default;
Tokenizer::~Tokenizer() = default;

Status Tokenizer::Impl::ParseAddedTokens(const Json& json, const std::string& origin,
                                         const std::filesystem::path& folder) {
  std::error_code error;
  const std::filesystem::path path = folder / "tokenizer_config.json";
  if (std::filesystem::exists(path, error)) {
    PQ_ASSIGN_OR_RETURN(const std::string text, ReadFile(path));
    PQ_ASSIGN_OR_RETURN(const Json config, ParseJson(text, path.string()));
    const Status listed = GuardJson(path.string(), [&]() -> Status {
      const Json tokens = config.value("added_tokens_decoder", Json::object());
      for (const auto& [id, token] : tokens.items()) {
        PQ_RETURN_IF_ERROR(AddToken(token, std::strtoll(id.c_str(), nullptr, 10), path.string()));
      }
      return {};
    });
    if (!listed.ok()) return listed;
  }
  for (const Json& token : json.value("added_tokens", Json::array())) {
    PQ_ASSIGN_OR_RETURN(const int64_t id, JsonInt(token, "id", origin + ": added token"));
    PQ_RETURN_IF_ERROR(AddToken(token, id, origin));
  }
  return {};
}

Result<std::unique_ptr<Tokenizer::Impl>> Tokenizer::Impl::Parse(
    const Json& json, const std::string& origin, const std::filesystem::path& folder) {
  if (!json.is_object() || !json.contains("model")) {
    return Status::InvalidInput(fmt::format("{}: no \"model\"", origin));
  }
  PQ_ASSIGN_OR_RETURN(Normalizer normalizer,
                      Normalizer::Parse(json.value("normalizer", Json()), origin));
  PQ_ASSIGN_OR_RETURN(PreTokenizer pre,
                      PreTokenizer::Parse(json.value("pre_tokenizer", Json()), origin));
  const auto symbols = pre.byte_level() ? Bpe::Symbols::kBytes : Bpe::Symbols::kCharacters;
  PQ_ASSIGN_OR_RETURN(Bpe bpe, Bpe::Parse(json["model"], symbols, origin));
  auto impl = std::make_unique<Impl>(std::move(normalizer), std::move(pre), std::move(bpe));
  PQ_RETURN_IF_ERROR(impl->ParseAddedTokens(json, origin, folder));
  if (const auto start = TemplateStart(json.value("post_processor", Json()))) {
    impl->bos = impl->TokenId(*start);
    if (!impl->bos) {
      return Status::InvalidInput(
          fmt::format("{}: post_processor begins with {}, which is no token", origin, *start));
    }
  }
  return impl;
}

std::optional<int32_t> Tokenizer::Impl::TokenId(std::string_view token) const {
  for (const AddedTokens* added : {&raw_tokens, &normalized_tokens}) {
    if (const int32_t id = added->Id(token); id >= 0) return id;
  }
  return bpe.Id(std::string(token));
}

Result<Tokenizer> Tokenizer::Load(const std::filesystem::path& folder) {
  const std::filesystem::path path = folder / "tokenizer.json";
  PQ_ASSIGN_OR_RETURN(const std::string text, ReadFile(path));
  PQ_ASSIGN_OR_RETURN(const Json json, ParseJson(text, path.string()));
  std::unique_ptr<Impl> impl;
  PQ_RETURN_IF_ERROR(GuardJson(path.string(), [&]() -> Status {
    PQ_ASSIGN_OR_RETURN(impl, Impl::Parse(json, path.string(), folder));
    return {};
  }));
  return Tokenizer(std::move(impl));
}

Result<std::vector<int32_t>> Tokenizer::Encode(std::string_view text) const {
  PQ_RETURN_IF_ERROR(CheckUtf8(text));
  std::vector<int32_t> ids;
  Impl::Cache cache;
  for (const AddedTokens::Part& part : impl_->raw_tokens.Split(text)) {
    if (part.id >= 0) {
      ids.push_back(part.id);
      continue;
    }
    bool first = part.text.data() == text.data();
    const std::string normalized = impl_->normalizer.Apply(part.text);
    for (const AddedTokens::Part& inner : impl_->normalized_tokens.Split(normalized)) {
      if (inner.id >= 0) {
        ids.push_back(inner.id);
      } else {
        impl_->EncodePlain(impl_->pre_tokenizer.Prepare(std::string(inner.text), first), cache,
                           ids);
      }
      first = false;
    }
  }
  return ids;
}

std::optional<int32_t> Tokenizer::bos() const { return impl_->bos; }

std::optional<int32_t> Tokenizer::TokenId(std::string_view token) const {
  return impl_->TokenId(token);
}

int32_t Tokenizer::size() const { return impl_->size; }

}  // namespace prismaquant
