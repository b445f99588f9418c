"""Forms of training beyond one averaged gradient: who works with whom, and what each form moves between ranks.

groups.py     which ranks form a replica of the model, and which hold the same part of it in all replicas
"""
