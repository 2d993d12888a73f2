// The all-row kernel of score_cpu (algorithm kCpuStrip) at the level of this translation unit.
#pragma once

#include "score/score.h"

TS_ISA_BEGIN

Status colsum_level(const ScoreParams& params, ParallelForFn threads);

TS_ISA_END
