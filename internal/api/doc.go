// Package api holds the contracts between the parts of Muster that may live on different machines.
//
//	Operator   what people and their tools ask of a master: REST over HTTP, described by OpenAPI; with its client
//	Appliance  what a master asks of an appliance
//	Silo       what a master asks of a silo
//
// Knows: requests, answers and their forms.
// Must not know: how any of them is carried out.
package api
