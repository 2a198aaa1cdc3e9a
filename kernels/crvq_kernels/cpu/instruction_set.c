/* The list of instruction sets, and the choice of the best. */
#include "instruction_set.h"

const instruction_set *const instruction_sets[INSTRUCTION_SETS] = {
    [SCALAR] = &scalar_set,
#ifdef HAVE_X86
    [AVX2] = &avx2_set,
    [AVX512BW] = &avx512bw_set,
    [VBMI] = &vbmi_set,
#endif
#ifdef HAVE_ARM64
    [NEON] = &neon_set,
#endif
};

int crvq_has_instructions(int number) {
    return number >= 0 && number < INSTRUCTION_SETS && instruction_sets[number] && instruction_sets[number]->runs_here();
}

int crvq_instructions(void) {
    int best = INSTRUCTION_SETS - 1;
    while (!crvq_has_instructions(best) || instruction_sets[best]->on_request) best--;
    return best;
}
