// Argument checks that raise a Python ValueError carrying the values seen.
#pragma once

#include <sstream>
#include <stdexcept>
#include <string>

namespace tpweave {

template <typename... Parts>
std::string concat(const Parts&... parts) {
  std::ostringstream stream;
  (stream << ... << parts);
  return stream.str();
}

}  // namespace tpweave

// std::invalid_argument reaches Python as ValueError.
#define TPWEAVE_CHECK(condition, ...)                                                              \
  do {                                                                                             \
    if (!(condition)) {                                                                            \
      throw std::invalid_argument(                                                                 \
          ::tpweave::concat(__VA_ARGS__, " [", #condition, ", ", __FILE__, ":", __LINE__, "]"));   \
    }                                                                                              \
  } while (0)
