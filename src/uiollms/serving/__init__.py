"""`uiollms serve`: an HTTP server in the schema of OpenAI's API, with documents as memories.

server      starts everything
app         the paths of the server
answers     answers in OpenAI's form, whole or streamed
page.html   the page for the browser
guard       an ASGI middleware: token, Host, Origin, size of a body
bodies      the fields of requests, and which of OpenAI's are supported
store       the documents on disk
compression a thread that compresses documents one after another
engine      threads that generate answers, a bounded queue before them
states      the memories that are loaded, up to a number of bytes
attention   how much an answer attended to each chunk
turns       one thread at a time uses the model, for one step
"""
