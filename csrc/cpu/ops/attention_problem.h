// An AttentionProblem as it comes from Python, checked: what reaches the kernels cannot make them leave their tensors.
#pragma once

#include <array>

#include "cpu/ops/attention.h"

namespace tpweave {

// In the order of `NativeProblem` in python/tpweave/ops/attention_problem.py.
using AttentionIntegers = std::array<int64_t, 48>;
using AttentionReals = std::array<double, 3>;

// Throws where sequences, pages or heads leave their tensors. `total_keys` is the number of packed keys, or of pages.
void check_attention_problem(const char* op, const AttentionProblem& p, int64_t total_keys, int64_t table_width);

AttentionProblem make_attention_problem(const char* op, const AttentionIntegers& integers, const AttentionReals& reals);

// Runs a problem that has been checked: csrc/cpu/ops/attention.cpp.
void run_attention(const char* op, const AttentionForward& args);

}  // namespace tpweave
