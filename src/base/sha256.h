#ifndef PRISMAQUANT_BASE_SHA256_H_
#define PRISMAQUANT_BASE_SHA256_H_

// Sha256: fingerprints of files, token ids and settings (OpenSSL's libcrypto). One thread per
// object.

#include <cstddef>
#include <memory>
#include <span>
#include <string>
#include <string_view>

namespace prismaquant {

class Sha256 {
 public:
  Sha256();
  Sha256(Sha256&&) noexcept;
  Sha256& operator=(Sha256&&) noexcept;
  ~Sha256();

  Sha256& Update(std::span<const std::byte> bytes);
  Sha256& Update(std::string_view text);
  // 64 hex digits; the object is spent.
  std::string Hex();

 private:
  struct Context;
  std::unique_ptr<Context> context_;
};

std::string Sha256Hex(std::string_view text);

}  // namespace prismaquant

#endif  // PRISMAQUANT_BASE_SHA256_H_
