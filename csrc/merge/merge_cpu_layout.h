// Where the CPU kernels keep the tokens of every output row. Shared by plan and kernels; internal to the room.
#pragma once

#include "merge/merge.h"

namespace tokensieve {

// One batch row's lists: row r has the tokens token[start[r] .. start[r + 1]); "row" R has those without a row.
struct MergeLayout {
  int64_t start = 0;    // int32 [R + 2]
  int64_t token = 0;    // int32 [N]
  int64_t row_of = 0;   // int32 [N]
  int64_t divisor = 0;  // float [R]: sum of weights, or the number of tokens, + epsilon
  int64_t ints = 0;     // of a batch row
};

inline MergeLayout merge_layout(const MergeParams& p) {
  MergeLayout at;
  at.token = at.start + p.R + 2;
  at.row_of = at.token + p.N;
  at.divisor = at.row_of + p.N;
  at.ints = (at.divisor + p.R + 15) / 16 * 16;
  return at;
}

}  // namespace tokensieve
