"""The pipeline: one short file per verb, `run(spec, staged, work) -> result`.

`staged` is an empty directory that becomes the stage's output if `run` returns; `work` is a place
beside it that survives interruptions. Stages never import one another.
"""
