"""Studies: one question a file. `python -m studies` lists them, `python -m studies NAME` answers one."""

# name of the file -> the question it answers
STUDIES = {
    "minority_collapse": "When does minority collapse happen, at the optimum and where descent ends?",
}
