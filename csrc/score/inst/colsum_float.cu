#include "score/colsum_kernel.cuh"

namespace tokensieve {
namespace colsum {
template Status launch_rows<float, 0>(const Args&, int64_t, void*);
template Status launch_columns<float, 0>(const Args&, int64_t, void*);
}  // namespace colsum
}  // namespace tokensieve
