#ifndef PRISMAQUANT_BASE_VERSION_H_
#define PRISMAQUANT_BASE_VERSION_H_

namespace prismaquant {

inline constexpr char kVersion[] = "0.1.0";

}  // namespace prismaquant

#endif  // PRISMAQUANT_BASE_VERSION_H_
