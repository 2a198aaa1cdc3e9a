/* The list of instruction sets, and the choice of the best. */
#include "instruction_set.h"

const instruction_set *const instruction_sets[INSTRUCTION_SETS] = {
    [SCALAR] = &scalar_set,
#ifdef HAVE_X86
    [AVX2] = &avx2_set,
    [VBMI] = &vbmi_set,
#endif
};

int crvq_instructions(void) {
    int best = INSTRUCTION_SETS - 1;
    while (!instruction_sets[best] || !instruction_sets[best]->runs_here()) best--;
    return best;
}
