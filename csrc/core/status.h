// What a launcher returns: nothing (ok) or one static sentence. Launchers never throw, print or abort.
// The sentence does not name the op: csrc/bind puts "tokensieve.<op>: " before it.
#pragma once

namespace tokensieve {

struct Status {
  const char* message = nullptr;  // static storage; null = ok

  constexpr bool ok() const { return message == nullptr; }
  static constexpr Status success() { return {}; }
  static constexpr Status error(const char* why) { return {why}; }
};

}  // namespace tokensieve
