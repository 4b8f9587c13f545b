// An AttentionProblem as it comes from Python, checked: what reaches the kernels cannot make them leave their tensors.
#pragma once

#include <array>

#include "cpu/ops/attention.h"

namespace tpweave {

// In the order of `NativeProblem` in python/tpweave/ops/attention_problem.py.
using AttentionIntegers = std::array<int64_t, 48>;
using AttentionReals = std::array<double, 3>;

AttentionProblem make_attention_problem(const char* op, const AttentionIntegers& integers, const AttentionReals& reals);

}  // namespace tpweave
