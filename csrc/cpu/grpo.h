// The formulas of the GRPO loss for the floats and vectors of simd.h.
#pragma once

#include "simd.h"
#define VLMK_NS VLMK_ISA
#include "../common/token_gradient.h"
