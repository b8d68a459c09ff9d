"""Follow README.md and docs/tutorial.md as a newcomer does, by copy and paste.

Without arguments in a fresh Debian 13, with `--here` on this machine; `tox run -e
newcomer` runs it. The blocks of a page are taken in order:

- `sh` is pasted into a terminal whose folder was the checkout. A block that ends with
  uvicorn gets a second terminal, where the server runs on.
- `python` is written to the file that the text before it names: to its end where the
  text says so.
- `text` is what the command before it has to have printed, or, where the text before
  it names the server, what the server has to print. Where that text says that
  something differs, numbers are not compared.

The command for all tests takes too long, so it is left out with `--here`. In Debian it
runs one file of them, on SQLite alone.
"""
