"""A webhook inbox that answers 2xx only when the event is on stable storage.

    python -m examples.webhook_inbox --host 127.0.0.1 --port 8080 --data inbox.ring

A webhook provider forgets an event once it was answered 2xx, so the answer is the one promise that the inbox
makes, and it may not be made before the bytes would survive a power cut. There is no database beside it: the
events lie in a ring of records in mapped memory.

`ring`     what the bytes of the file are (pure: bytes in, values out)
`inbox`    the ring on an `apmem2.Map`: store, read, consume, recover
`app`      HTTP: what is answered, and when
`__main__` the command line and uvicorn
`deliveries` realistic deliveries made from `payloads/`, for the demo and the tests

One process, one worker: the index of ids and the next free slot live in the memory of the process, so a second
worker on the same file would give the same slot away twice. A lock beside the file refuses it.

The ring stands in until the append log of a later version of apmem2 replaces it. Signatures of the providers are
not checked here: verify them before `Inbox.store` in a service of your own.
"""
