"""LIBERO and LIBERO-PRO: a robot arm at a table, in MuJoCo, a real simulator of its own Python.

`suites` lists the tasks and what the policy is told, `profiles` how published evaluations run them;
these need numpy alone. `simulator` builds the worlds, `rollout` evaluates a policy server, `record`
makes demonstrations with the scripted `expert`. `setup.sh` makes the environment.
"""
