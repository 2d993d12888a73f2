#include "score/colsum_wgmma_columns.cuh"
#include "score/colsum_wgmma_rows.cuh"

namespace tokensieve {
namespace colsum {
template Status launch_wgmma_rows<__half, 4>(const Args&, void*);
template Status launch_wgmma_columns<__half, 4>(const Args&, void*);
template Status launch_wgmma_rows<__half, 5>(const Args&, void*);
template Status launch_wgmma_columns<__half, 5>(const Args&, void*);
template Status launch_wgmma_rows<__half, 8>(const Args&, void*);
template Status launch_wgmma_columns<__half, 8>(const Args&, void*);
}  // namespace colsum
}  // namespace tokensieve
