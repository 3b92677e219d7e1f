"""Dense labels for vision models: annotate every image once, train students on the maps.

`tokenlabel.annotate` makes score maps with a large classifier, `tokenlabel.storage` keeps
them, `tokenlabel.labeling` replays them while a student trains. Importing this package loads
none of the heavy libraries.
"""
