// The formulas of the GRPO loss on a GPU.
#pragma once

#include "vec.h"

namespace vlmk::cuda {
VLMK_HD float exp(float x) { return expf(x); }
}  // namespace vlmk::cuda

#define VLMK_NS cuda
#include "../common/token_gradient.h"
