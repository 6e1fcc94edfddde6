from attnlib.look.attribution import merge_pieces, verbalize

tokens = ["[CLS]", "a", "de", "##light", "##ful", "film", ",", "but", "long", "[SEP]"]
scores = [0.3, 0.1, 0.5, 0.4, 0.3, 0.2, 0.0, -0.2, -0.4, 0.1]
words, of_words, _ = merge_pieces(tokens, scores)
print(verbalize(words, of_words, label="positive").text)
