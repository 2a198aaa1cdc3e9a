"""What a run will take, told before it begins: memory, disk, and about how long.

`sizes` reads the shapes of a model that has no numbers, `memory` adds up what each phase holds, `plan` compares that
with what is there, `estimate` times a short piece of the work. The pipeline calls `plan` before every run.
"""
