"""The paper's comparison: one base model, one set of tasks, several ways to adapt it, evaluated alike.

::

    recipe.yaml  ─►  settings.py   a training recipe with a section `compare`
    task files   ─►  roles.py      which task is trained on, validated on, seen, unseen
                     regimes.py    a regime -> the recipe of its training
                     budgets.py    how long each regime trains, so that budgets are equal
                     cells.py      what is trained and evaluated: trials of learning rates, then runs
                     choosing.py   trials -> the learning rate of each regime
                     checks.py     what would go wrong, all of it before anything is trained
                     plan.py       what it will cost
                     run.py        the work, cell by cell
                     forgetting_along.py   what is measured besides the tasks
                     records.py    what is on the disk
                     statistics.py records -> means, differences, shares of a gap, costs, what is missing
                     estimates.py  errors that hold trainings, draws of demonstrations and queries

Source: He et al. 2025, arXiv:2506.11103.
"""
