#include "score/score_kernel.cuh"

namespace tokensieve {
namespace score {
template Status launch<__half, 2>(const Args&, int, int, int64_t, void*);
}  // namespace score
}  // namespace tokensieve
