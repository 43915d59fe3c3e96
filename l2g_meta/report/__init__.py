"""A page to look at: ``l2g report RUN [RUN ...]`` draws what trained runs did into one HTML file.

``runs`` reads folders, ``measure`` and ``gather`` test what is trained; ``confusion``, ``reliability`` and
``embeddings`` are numbers; ``svg``, ``charts`` and ``thumbnails`` pictures of them; ``page`` and ``details`` the text,
``command`` the command.
"""
