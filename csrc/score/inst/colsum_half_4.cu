#include "score/colsum_kernel.cuh"

namespace tokensieve {
namespace colsum {
template Status launch_rows<__half, 4>(const Args&, int64_t, void*);
template Status launch_columns<__half, 4>(const Args&, int64_t, void*);
}  // namespace colsum
}  // namespace tokensieve
