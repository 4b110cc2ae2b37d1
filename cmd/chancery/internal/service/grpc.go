package service

import (
	"context"
	"net/http"
	"strings"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/health/grpc_health_v1"
	grpcstatus "google.golang.org/grpc/status"

	caserver "github.com/chancery-ca/chancery/ca/server"
)

// newGRPC makes the one gRPC server, which answers on the same listener and
// HTTP/2 connections as everything else (sigstore-java knows one host and port
// alone). The HTTP server bounds streams and headers for both.
func (s *Service) newGRPC() *grpc.Server {
	server := grpc.NewServer(
		grpc.MaxRecvMsgSize(caserver.MaxBody),
		grpc.UnaryInterceptor(s.recoverGRPC),
		grpc.ConnectionTimeout(10*time.Second),
	)
	grpc_health_v1.RegisterHealthServer(server, grpcHealth{service: s})
	return server
}

// recoverGRPC turns a panic into an internal error, as the HTTP side does.
func (s *Service) recoverGRPC(ctx context.Context, req any, info *grpc.UnaryServerInfo, next grpc.UnaryHandler) (answer any, err error) {
	defer func() {
		if p := recover(); p != nil {
			s.log.Error("request panicked", "method", info.FullMethod, "err", p)
			answer, err = nil, grpcstatus.Error(codes.Internal, "internal error")
		}
	}()
	return next(ctx, req)
}

// split sends gRPC calls to the gRPC server, everything else to echo.
func (s *Service) split(w http.ResponseWriter, r *http.Request) {
	if s.grpc != nil && r.ProtoMajor == 2 && strings.HasPrefix(r.Header.Get("Content-Type"), "application/grpc") {
		defer s.issuing.LimitBody(r)()
		s.grpc.ServeHTTP(w, r)
		return
	}
	s.echo.ServeHTTP(w, r)
}

// grpcHealth is grpc.health.v1.Health: what /readyz says.
type grpcHealth struct {
	grpc_health_v1.UnimplementedHealthServer
	service *Service
}

// Check answers for the server as a whole; other names are not known.
func (h grpcHealth) Check(_ context.Context, req *grpc_health_v1.HealthCheckRequest) (*grpc_health_v1.HealthCheckResponse, error) {
	switch req.GetService() {
	case "", "dev.sigstore.fulcio.v2.CA":
	default:
		return nil, grpcstatus.Error(codes.NotFound, "unknown service")
	}
	answer := &grpc_health_v1.HealthCheckResponse{Status: grpc_health_v1.HealthCheckResponse_SERVING}
	if err := h.service.Ready(); err != nil {
		h.service.log.Warn("not ready", "err", err)
		answer.Status = grpc_health_v1.HealthCheckResponse_NOT_SERVING
	}
	return answer, nil
}
