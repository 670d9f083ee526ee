"""A soak: exports of one day run in processes of their own, faults strike them at random moments, round after round.

`exports` are what runs, `rows` what is in ClickHouse, `plan` which runs and faults a seed gives; `processes`, `faults` and
`actions` are the runs, what strikes them, and what an owner does to the tables meanwhile; `checks` is what must be true, and
`play` puts all of this together.

A seed gives the same rows, ranges, faults, actions and moments; what exactly a fault meets is up to the machine. After each
round the sensors of late rows request what they find, and then each interval that the ledger has must be there, each row once,
and nothing else; at the end the faults stop, the lacking intervals are exported, and the destination must hold what the source
has.
"""
