"""What methods score by: saliency of the vision tower and relevance to the question.

Pure torch: neither vLLM nor transformers is imported here, and nothing else of this package.
"""
