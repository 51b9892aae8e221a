// Package api holds the contracts between the parts of Muster that may live on different machines.
//
//	Operator   what people and their tools ask of a master: REST over HTTP, described by OpenAPI; with its client
//	Appliance  what a master asks of an appliance
//	Silo       what a master asks of a silo
//
// Both travel between machines as connect calls with JSON (call.go): ApplianceHandler and SiloHandler serve one,
// RemoteAppliance and RemoteSilo are one that is elsewhere. How the bytes get there is the link's (internal/trust).
//
// Knows: requests, answers and their forms.
// Must not know: how any of them is carried out.
package api
