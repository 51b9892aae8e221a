#!/usr/bin/python3
"""A small shop: products and orders in PostgreSQL, a page that shows both, and a form that places an order."""
import html
import http.server
import os
import socket
import urllib.parse

import psycopg2

PAGE = """<!doctype html><title>The shop</title><h1>The shop</h1>
<h2>Products</h2><ul>{products}</ul>
<h2>Orders</h2><ul>{orders}</ul>
<form method=post action=/orders><input name=customer placeholder=Name required>
<input name=quantity type=number value=1 min=1><select name=product>{options}</select><button>Order</button></form>
"""
MAX_FORM = 4096  # bytes


def query(sql, *values):
    """Run one statement in a transaction of its own and return its rows."""
    db = psycopg2.connect(dbname="shop", host="/var/run/postgresql")
    try:
        with db, db.cursor() as cursor:
            cursor.execute(sql, values)
            return cursor.fetchall()
    finally:
        db.close()


class Shop(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        if self.path != "/":
            return self.answer(404, "not found\n", "text/plain")
        products = query("SELECT id, name, cents FROM product ORDER BY id")
        orders = query("SELECT o.id, o.customer, o.quantity, p.name FROM orders o JOIN product p ON p.id = o.product"
                       " ORDER BY o.id DESC LIMIT 100")
        self.answer(200, PAGE.format(
            products="".join(f"<li>{html.escape(n)} {c / 100:.2f}</li>" for _, n, c in products),
            options="".join(f"<option value={i}>{html.escape(n)}" for i, n, _ in products),
            orders="".join(f"<li>order {i}: {q} x {html.escape(n)} for {html.escape(c)}</li>" for i, c, q, n in orders)))

    def do_POST(self):
        length = int(self.headers.get("Content-Length") or 0)
        if self.path != "/orders" or not 0 < length <= MAX_FORM:
            return self.answer(404, "not found\n", "text/plain")
        form = dict(urllib.parse.parse_qsl(self.rfile.read(length).decode(errors="replace")))
        try:
            rows = query("INSERT INTO orders (customer, product, quantity) VALUES (%s, %s, %s) RETURNING id",
                         form["customer"], int(form["product"]), int(form["quantity"]))
        except (KeyError, ValueError, psycopg2.IntegrityError, psycopg2.DataError):
            return self.answer(400, "an order needs a customer, a product we have and a quantity\n", "text/plain")
        self.answer(201, f"order {rows[0][0]}\n", "text/plain")

    def answer(self, status, text, kind="text/html"):
        body = text.encode()
        self.send_response(status)
        self.send_header("Content-Type", kind + "; charset=utf-8")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


if __name__ == "__main__":
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 8000), Shop)
    if address := os.environ.get("NOTIFY_SOCKET"):  # tell systemd that we are ready
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as notify:
            notify.sendto(b"READY=1", address.replace("@", "\0", 1) if address.startswith("@") else address)
    server.serve_forever()
