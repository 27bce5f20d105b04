"""`qserve bench`: what a server, or a model in this process, does in a second, measured so that it can be believed.

One run interleaves everything that is compared, repeats it, and says how sure the figures are. Definitions and JSON
names are those of vLLM's own benchmarks. Knows servers by OpenAI's API alone: any that speaks it can be measured.
"""
