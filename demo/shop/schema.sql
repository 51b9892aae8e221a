CREATE ROLE shop LOGIN; -- the shop's own system user, over the local socket
CREATE DATABASE shop OWNER shop;
\connect shop
SET ROLE shop;
CREATE TABLE product (id serial PRIMARY KEY, name text NOT NULL, cents integer NOT NULL CHECK (cents > 0));
CREATE TABLE orders (
	id serial PRIMARY KEY,
	placed timestamptz NOT NULL DEFAULT now(),
	customer text NOT NULL CHECK (length(customer) BETWEEN 1 AND 100),
	product integer NOT NULL REFERENCES product,
	quantity integer NOT NULL CHECK (quantity BETWEEN 1 AND 1000)
);
INSERT INTO product (name, cents) VALUES ('Fire extinguisher', 8900), ('Smoke detector', 2450), ('Fireproof box', 15900);
INSERT INTO orders (customer, product, quantity) SELECT 'customer ' || n, 1 + n % 3, 1 + n % 5 FROM generate_series(1, 40) n;
