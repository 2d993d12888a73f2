#include "score/colsum_kernel.cuh"

namespace tokensieve {
namespace colsum {
template Status launch_rows<__nv_bfloat16, 8>(const Args&, int64_t, void*);
template Status launch_columns<__nv_bfloat16, 8>(const Args&, int64_t, void*);
}  // namespace colsum
}  // namespace tokensieve
