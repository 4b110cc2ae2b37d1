// Package memory keeps the memory of a program to itself: a PIN is in it for as
// long as a token is open.
package memory
