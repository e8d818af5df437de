"""Video-LLMs behind one protocol. The only package that imports transformers."""
