// Which instruction sets this processor and kernel allow, and which one the process uses.
#pragma once

#include <string>
#include <vector>

namespace tpweave {

// Ordered: a higher value includes every instruction of the lower ones.
enum class Isa : int { kPortable = 0, kAvx2 = 1, kAvx512 = 2, kAvx512Bf16 = 3 };

const char* isa_name(Isa isa);

// Instruction sets that were compiled in and that this machine runs, ascending.
std::vector<Isa> available_isas();

// The best available one, or the one that TPWEAVE_ISA names (read once, at load).
Isa active_isa();

// For tests: replaces the active one. Throws std::invalid_argument when it is not available.
void set_active_isa(const std::string& name);

}  // namespace tpweave
