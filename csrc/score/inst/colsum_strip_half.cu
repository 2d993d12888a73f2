#include "score/colsum_strip.cuh"

namespace tokensieve {
namespace colsum {
template Status launch_strips<__half, 4>(const Args&, int, void*);
template Status launch_strips<__half, 5>(const Args&, int, void*);
}  // namespace colsum
}  // namespace tokensieve
