"""Hand-over of everything that lives from one process to the next: `states.py` says what happens,
`wire.py` what is said, `faults.py` where tests break it. docs/handover.md is the way in."""
