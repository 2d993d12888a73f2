// Facts that plan, launcher and kernel of complement_index share. Internal to the room.
#pragma once

#include "select/complement.h"

namespace tokensieve {
namespace select {

constexpr int64_t kComplementStaticShared = 1024;  // 32 warp sums, rounded up
constexpr int kComplementItems = 8;                // positions a thread takes of a tile

}  // namespace select
}  // namespace tokensieve
