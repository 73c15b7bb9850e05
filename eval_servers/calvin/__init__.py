"""CALVIN: 1000 chains of five instructions in calvin_env, a real simulator of its own Python.

`chains` holds the evaluation's list, `initial` the states it starts from, `oracle` what counts as
solved; these need numpy alone. `simulator` builds calvin_env, `rollout` evaluates a policy server,
`record` makes demonstrations with the scripted `expert`. `setup.sh` makes the environment.
"""
