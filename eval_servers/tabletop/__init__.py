"""A small language-conditioned tabletop world in numpy and Pillow, shaped like CALVIN.

`env.TabletopEnv` is the environment, `tasks` the instructions and oracles, `expert` the scripted
demonstrator; `python -m eval_servers.tabletop.demo` shows it at work.
"""
