#include "score/colsum_wgmma.cuh"

namespace tokensieve {
namespace colsum {
template Status launch_wgmma_columns<__nv_bfloat16, 4>(const Args&, void*);
template Status launch_wgmma_columns<__nv_bfloat16, 5>(const Args&, void*);
template Status launch_wgmma_columns<__nv_bfloat16, 8>(const Args&, void*);
}  // namespace colsum
}  // namespace tokensieve
