data "aws_region" "current" {}

resource "aws_vpc_endpoint" "s3" {
  count = var.vpc_endpoint == null ? 0 : 1

  vpc_id            = var.vpc_endpoint.vpc_id
  service_name      = "com.amazonaws.${data.aws_region.current.id}.s3"
  vpc_endpoint_type = "Gateway"
  route_table_ids   = var.vpc_endpoint.route_table_ids
  tags              = merge(var.tags, { Name = "${var.name}-s3" })
}
