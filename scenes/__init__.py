"""The embedded default: procedural captioned scenes, tiny encoders for them, an exact oracle.

Nothing here is needed to train on your own pictures. It exists so that one command shows the whole
system at work, offline, on a CPU, and so that a picture can be judged without a human: the oracle
knows what a caption asks for and reads what a picture shows.

    python -m scenes.train_encoders --out scenes/encoders      # how the shipped encoders were made
"""
